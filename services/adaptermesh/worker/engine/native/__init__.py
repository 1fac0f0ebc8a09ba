"""The kernels of the CPU path in C++: compiled once for a kind of machine, called through ctypes."""

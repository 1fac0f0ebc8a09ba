import subprocess
import sys

COMMAND = "from adaptermesh.store.allocator import set_up_allocator; print(set_up_allocator())"


def test_the_allocator_of_the_c_library_takes_all_of_it() -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND], check=True, capture_output=True, text=True)
    assert done.stdout == "True\n"

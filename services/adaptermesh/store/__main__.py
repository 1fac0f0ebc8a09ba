"""`python -m adaptermesh.store`."""

import sys

from adaptermesh.rpc.service import run
from adaptermesh.store.allocator import set_up_allocator
from adaptermesh.store.service import GRPC_NAME, StoreService
from adaptermesh.store.settings import StoreSettings

if __name__ == "__main__":
    set_up_allocator()
    sys.exit(run("store", GRPC_NAME, StoreSettings(), StoreService))

"""Puts two adapters into a store whose bytes are in S3, or looks whether they are still whole there.

Run from the repository's root: `python -m` can't name a folder that begins with a dot.
"""

import argparse
import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from adaptermesh.api.store.v1 import store_pb2, store_pb2_grpc
from adaptermesh.core.digests import digest_bytes
from adaptermesh.rpc.channel import open_channel
from tests.integration.store_process import adapter_files, base_model, large_files, upload_messages

# One of the second one's files is so large that S3 takes it in parts.
ADAPTERS = {"small": adapter_files(1), "large": large_files(2)}
SECONDS = 120.0


async def main(target: str, action: str) -> None:
    async with open_channel(target) as channel:
        stub = store_pb2_grpc.StoreServiceStub(channel)
        if action == "put":
            request = store_pb2.RegisterBaseModelRequest(base_model=base_model())
            await stub.RegisterBaseModel(request, timeout=SECONDS)
            for name, files in ADAPTERS.items():
                answer = await stub.UploadAdapter(upload_messages(name, files), timeout=SECONDS)
                print(f"{name}: {answer.version.digest}")
        for name, files in ADAPTERS.items():
            await check(stub, name, files)
        collected = await stub.CollectGarbage(store_pb2.CollectGarbageRequest(dry_run=True), timeout=SECONDS)
        print(f"{collected.needed_blobs} blobs are needed, {collected.young_blobs} are not")
        if not collected.needed_blobs or collected.young_blobs:
            raise SystemExit("the bucket has other blobs than those of the two adapters")


async def check(stub: "store_pb2_grpc.StoreServiceAsyncStub", name: str, files: dict[str, bytes]) -> None:
    resolved = await stub.ResolveRef(store_pb2.ResolveRefRequest(ref=f"acme/{name}:v1"), timeout=SECONDS)
    digest = resolved.version.digest
    if digest_bytes(resolved.manifest) != digest:
        raise SystemExit(f"{name}: the manifest is not that of {digest}")
    for path, data in files.items():
        call = stub.DownloadFile(store_pb2.DownloadFileRequest(digest=digest, path=path), timeout=SECONDS)
        if b"".join([part.data async for part in call]) != data:
            raise SystemExit(f"{name}: {path} is not what was uploaded")
    print(f"{name}: whole")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target", help="host:port of the store")
    parser.add_argument("action", choices=["put", "check"])
    arguments = parser.parse_args()
    asyncio.run(main(arguments.target, arguments.action))

"""`python -m adaptermesh.store.make_bucket`: makes the bucket that the settings name, when S3 answers.

For set-ups that begin with an empty server. The store itself only looks: a misspelt name is an error there.
"""

import asyncio
import sys

from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.store.s3_connection import S3Config, S3Connection
from adaptermesh.store.service import store_config
from adaptermesh.store.settings import StoreSettings

_WAIT_SECONDS = 60.0
_PAUSE_SECONDS = 0.5


async def make_bucket(config: S3Config, within: float) -> bool:
    """Returns whether the bucket is new.

    Args:
        config: names the server and the bucket.
        within: seconds that the server may take until it answers.

    Raises:
        MeshError: UNAVAILABLE: it didn't, or it refuses.
    """
    connection = S3Connection(config)
    deadline = asyncio.get_running_loop().time() + within

    def make() -> bool:
        if connection.client.bucket_exists(config.bucket):
            return False
        connection.client.make_bucket(config.bucket)
        return True

    try:
        while True:
            try:
                return await connection.look(make)
            except MeshError:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(_PAUSE_SECONDS)
    finally:
        connection.close()


def main() -> int:
    """Exit code 0 when the bucket is there."""
    try:
        config = store_config(StoreSettings()).s3
        if config is None:
            raise MeshError(Code.FAILED_PRECONDITION, Reason.INVALID_FIELD, "no S3 endpoint is set")
        made = asyncio.run(make_bucket(config, _WAIT_SECONDS))
    except MeshError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 2
    sys.stderr.write(f"bucket '{config.bucket}' {'made' if made else 'was there'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

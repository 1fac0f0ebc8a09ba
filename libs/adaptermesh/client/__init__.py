"""The Python SDK of adaptermesh: publish adapters, route tasks to them, generate.

```python
import asyncio
from adaptermesh.client import MeshClient, Publication, StoreClient

async def main() -> None:
    async with StoreClient() as store, MeshClient() as mesh:
        await store.upload("my-adapter", "acme/ner", Publication("smollm2-135m-instruct", task="ner"))
        move = await store.set_alias("acme/ner@prod", "v1")
        print((await mesh.complete("ACME buys Initech.", adapter="acme/ner@prod")).text)

asyncio.run(main())
```

Every call has a deadline (`Deadlines`), every failure is a `MeshError` with a code, a reason and, where a
retry makes sense, a delay. Nothing here needs torch.
"""

from adaptermesh.client.access_records import (
    ApiKey,
    ApiKeyChange,
    AuditEntry,
    AuditQuery,
    Caller,
    Grant,
    GrantChange,
    Namespace,
    NamespaceChange,
    NewApiKey,
    Tenant,
    TenantChange,
    Usage,
)
from adaptermesh.client.calls import DEFAULT_GATEWAY, DEFAULT_ROUTER, DEFAULT_STORE, Deadlines
from adaptermesh.client.changes import CHANGE_KINDS, Change, FeedPlace
from adaptermesh.client.generation import (
    Ask,
    Choice,
    ChoiceFinished,
    Delta,
    Event,
    Finished,
    Generation,
    Message,
    Prompt,
    PromptLogprobs,
    Started,
    SwitchKind,
    Timings,
)
from adaptermesh.client.integrity_records import (
    BlobCheck,
    GarbageReport,
    NamespacePolicy,
    PolicyChange,
    Signature,
    Signed,
    SigningKey,
    Verification,
)
from adaptermesh.client.mesh import GenerationStream, MeshClient
from adaptermesh.client.mesh_records import Budgets, FeedStatus, Load, Model, Residency, RouterStatus, Worker
from adaptermesh.client.operations import (
    GATEWAY_SERVICE,
    ROUTER_SERVICE,
    STORE_SERVICE,
    WORKER_SERVICE,
    HealthClient,
    RouterClient,
    WorkerClient,
)
from adaptermesh.client.records import (
    Adapter,
    Alias,
    AliasMove,
    BaseModel,
    Copied,
    DeletedVersion,
    Exported,
    Found,
    Imported,
    Merge,
    MergedMember,
    MergeResult,
    Publication,
    Removal,
    ResolvedRef,
    Route,
    RouteChange,
    RouteTarget,
    Search,
    SourceFile,
    StatusChange,
    StatusHistory,
    UploadResult,
    Version,
    VersionDifference,
    VersionStatus,
)
from adaptermesh.client.store import StoreClient
from adaptermesh.client.transfer import Progress, ProgressCallback
from adaptermesh.core.alias_action import AliasAction
from adaptermesh.core.errors import Code, MeshError, Reason
from adaptermesh.core.logprobs import TokenLogprobs
from adaptermesh.core.roles import Role
from adaptermesh.core.sampling import SamplingParams
from adaptermesh.core.signature_policy import SignaturePolicy
from adaptermesh.core.tiers import Tier
from adaptermesh.core.version_state import VersionState

__all__ = [
    "CHANGE_KINDS",
    "DEFAULT_GATEWAY",
    "DEFAULT_ROUTER",
    "DEFAULT_STORE",
    "GATEWAY_SERVICE",
    "ROUTER_SERVICE",
    "STORE_SERVICE",
    "WORKER_SERVICE",
    "Adapter",
    "Alias",
    "AliasAction",
    "AliasMove",
    "ApiKey",
    "ApiKeyChange",
    "Ask",
    "AuditEntry",
    "AuditQuery",
    "BaseModel",
    "BlobCheck",
    "Budgets",
    "Caller",
    "Change",
    "Choice",
    "ChoiceFinished",
    "Code",
    "Copied",
    "Deadlines",
    "DeletedVersion",
    "Delta",
    "Event",
    "Exported",
    "FeedPlace",
    "FeedStatus",
    "Finished",
    "Found",
    "GarbageReport",
    "Generation",
    "GenerationStream",
    "Grant",
    "GrantChange",
    "HealthClient",
    "Imported",
    "Load",
    "Merge",
    "MergeResult",
    "MergedMember",
    "MeshClient",
    "MeshError",
    "Message",
    "Model",
    "Namespace",
    "NamespaceChange",
    "NamespacePolicy",
    "NewApiKey",
    "PolicyChange",
    "Progress",
    "ProgressCallback",
    "Prompt",
    "PromptLogprobs",
    "Publication",
    "Reason",
    "Removal",
    "Residency",
    "ResolvedRef",
    "Role",
    "Route",
    "RouteChange",
    "RouteTarget",
    "RouterClient",
    "RouterStatus",
    "SamplingParams",
    "Search",
    "Signature",
    "SignaturePolicy",
    "Signed",
    "SigningKey",
    "SourceFile",
    "Started",
    "StatusChange",
    "StatusHistory",
    "StoreClient",
    "SwitchKind",
    "Tenant",
    "TenantChange",
    "Tier",
    "Timings",
    "TokenLogprobs",
    "UploadResult",
    "Usage",
    "Verification",
    "Version",
    "VersionDifference",
    "VersionState",
    "VersionStatus",
    "Worker",
    "WorkerClient",
]

"""The agent: handoffs between hosts over gRPC, and the service that orchestration calls."""

import os

# gRPC's core writes lines of its own to standard error, one for each stranger who knocks; it reads this when it starts.
# What matters of them reaches the caller as an error.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

"""The NVFlare engine: devices in processes and on machines of their own, with NVFlare's transport between them.

What is used of NVFlare is its communication layer: cells with names, mutual TLS that binds a name to a certificate,
and messages of bytes between them. Its job system is not: rounds, devices' work and resuming are this project's own.
Needs the extra `nvflare`; nothing outside this package imports it before an option names the engine.
"""

import os

# read when gRPC is loaded, which writes to stderr as it pleases; what is worth knowing is in NVFlare's log
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

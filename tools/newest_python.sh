#!/bin/sh
# Print the newest working Python of the given versions, by default 3.13 to 3.11. Installed shims may fail to run.
for version in ${*:-3.13 3.12 3.11}; do
    for candidate in "python$version" "$HOME/.pyenv/versions/$version".*/bin/python3; do
        # -m venv requires ensurepip, which some distributions do not include
        if "$candidate" -c "import sys, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
            command -v "$candidate"
            exit
        fi
    done
done
command -v python3

#!/bin/sh
# Print the newest Python that really runs, of the versions given or of 3.13 down to 3.11: a shim may be there and fail.
for version in ${*:-3.13 3.12 3.11}; do
    for candidate in "python$version" "$HOME/.pyenv/versions/$version".*/bin/python3; do
        # -m venv needs ensurepip, which some distributions leave out
        if "$candidate" -c "import sys, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
            command -v "$candidate"
            exit
        fi
    done
done
command -v python3

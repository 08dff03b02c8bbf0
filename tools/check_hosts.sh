#!/bin/sh
# No file of the tree may name the host of a package registry: where packages come from is the machine's own affair.
# The names are put together here, so that this file does not hold them either.
set -eu
dot='[.]'
hosts="py""pi${dot}org|python""hosted${dot}org|npm""js${dot}org|deb""ian${dot}org|ubuntu""${dot}com|docker""${dot}io"
hosts="$hosts|gh""cr${dot}io|qu""ay${dot}io|gc""r${dot}io|cra""tes${dot}io|proxy${dot}golang${dot}org"
if git grep -nIE "$hosts" -- .; then
    echo "the lines above name a package registry's host: take the name out" >&2
    exit 1
fi

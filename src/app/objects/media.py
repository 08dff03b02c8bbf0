"""The content type that an upload is stored with."""

import mimetypes

UNKNOWN = "application/octet-stream"
# what clients send when they know nothing: curl says the last one of any bare body
SAYS_NOTHING = frozenset({"", UNKNOWN, "binary/octet-stream", "application/x-www-form-urlencoded"})
MORE_TYPES = {".parquet": "application/vnd.apache.parquet", ".ndjson": "application/x-ndjson", ".md": "text/markdown"}
MAX_CHARACTERS = 200
# the module's own table: what this machine's files say must not decide
KNOWN = mimetypes.MimeTypes(filenames=())


def media_type(given: str, key: str) -> str:
    """What the client said, unless that was nothing or no header can carry it; then what the key's ending says."""
    said = given.strip()
    fits = said.isascii() and said.isprintable() and len(said) <= MAX_CHARACTERS
    if fits and said.partition(";")[0].strip().lower() not in SAYS_NOTHING:
        return said
    name = key.rpartition("/")[2]
    ending = "." + name.rpartition(".")[2].lower()
    guessed, encoding = KNOWN.guess_type(name)
    return MORE_TYPES.get(ending) or (guessed if guessed and not encoding else UNKNOWN)

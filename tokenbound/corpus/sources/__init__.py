"""The sources of a corpus, one file each, found through `SOURCES`.

| source          | one document is                             | read as                                          |
|-----------------|---------------------------------------------|--------------------------------------------------|
| `python-stdlib` | one ``*.py`` file of this Python's library  | bytes for the tokenizer `bytes`, else text       |
| `text`          | one file                                    | text in `encoding`, decompressed by its content  |
| `jsonl`         | one line                                    | text in `encoding`, decompressed by its content  |
| `csv`           | one row below the header                    | text in `encoding`, decompressed by its content  |
| `mds`           | one sample                                  | text, or bytes that hold UTF-8                   |
| `parquet`,      | one row                                     | text, or bytes that hold UTF-8                   |
| `arrow`, `hf`   |                                             |                                                  |
| `tokens`        | the ids up to and including each `eos_id`   | ids                                              |
| `megatron`,     | what the index beside the ids says          | ids                                              |
| `datatrove`     |                                             |                                                  |

Adding a source is one file here and one test, five minutes for a simple format:

1. Copy the example in `base` into a new file, and give its class a `name`.
2. Declare its keys of `what.corpus` in a class of `Fields`: inherit the shared ones from `fields`, add its own with a
   default and a docstring each, and name the class in `takes`.
3. Say which files of a directory are its own in `suffixes`. A source that finds its documents otherwise overrides
   `find`, and `digest` where they are no files.
4. Yield the documents of one file in `documents`, in their order; or, of token ids, derive from `IdSource` and yield
   them in `ids`. Refuse what cannot be read with an `InputError` that names file, place and cure.
5. Write a test that prepares a small corpus and compares its documents, and one for each refusal.

Config, command line, digests, the prepared corpus and the certificate find it here; nothing else is edited. A package
of your own may bring one through an entry point:

    [project.entry-points."tokenbound.sources"]
    fortune = "my_package.fortune_source:Fortune"

Configs then name it like a built-in one. Its distribution and version are part of the corpus digest and stand on the
certificate, among the declarations, because nobody can check what it read without it.
"""

from __future__ import annotations

from tokenbound.corpus.sources.base import FileSource, IdSource, Source, TextSource
from tokenbound.corpus.sources.fields import Fields
from tokenbound.plugins import Registry

__all__ = ["SOURCES", "FileSource", "IdSource", "Source", "TextSource", "sources_with"]

SOURCES = Registry[Source[Fields]](
    "corpus source",
    group="tokenbound.sources",
    package="tokenbound.corpus.sources",
    contract="tokenbound.corpus.sources.base:Source",
)
"""By name; a name that is not built in is looked for among the installed plugins."""


def sources_with(key: str) -> list[str]:
    """The built-in sources to which a key of `what.corpus` applies.

    >>> sources_with("text_field")
    ['arrow', 'csv', 'hf', 'jsonl', 'mds', 'parquet']
    """
    return [name for name, source in SOURCES.built_in.items() if source.applies(key)]

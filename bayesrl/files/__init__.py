"""Safe files: read and write only regular files, check JSON against bounds and a schema, one writer per folder."""

"""Files: only plain ones are read or written, JSON is read with bounds and by a schema, and a folder has one writer."""

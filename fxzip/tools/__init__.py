"""What users do with networks and zips beside `compile_zip`: one function per file."""

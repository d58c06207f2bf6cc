"""The same over HTTP: page, limits, decoding of strangers' pictures in processes of their own."""

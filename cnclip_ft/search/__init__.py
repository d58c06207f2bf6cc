"""Search: an index of pictures (`index`), questions and their answers (`engine`), a page (`web`); docs/search.md."""

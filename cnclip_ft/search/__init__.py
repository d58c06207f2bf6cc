"""Search: an index of pictures, questions in words and pictures, a page (docs/search.md).

listing → parts → index_folder (`build` leads) · exact, approximate (vectors → best numbers) · query, engine (words and
pictures → vector → found) · batcher, guard, api, serve (the same over HTTP).
"""

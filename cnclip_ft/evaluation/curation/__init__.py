"""`data curate`: what of a store is better left out, and the page that shows it."""

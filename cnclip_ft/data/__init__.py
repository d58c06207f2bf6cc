"""From a store to batches: decoding, tokenising, ordering. One room above `data_tools`."""

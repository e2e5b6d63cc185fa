"""Reading, formats, chat rendering and loss masks, checks, splits, packing, the sample collection."""

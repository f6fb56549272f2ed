"""Images, captions and masks: found, sorted into buckets, dealt out in an order that the seed decides."""

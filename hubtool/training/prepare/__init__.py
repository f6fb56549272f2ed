"""From a folder of pictures to a folder that trains well: checked, without duplicates, cut to buckets, with captions and masks."""

"""The review seat: a page on this computer on which an expert corrects flagged regions (docs/review.md)."""

"""Which processes there are: how they find each other, who works with whom, what they send."""

"""Questions in words and pictures → vector → found pictures."""

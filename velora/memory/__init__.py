"""Memory tools: ledger (what autograd holds), meter (what the device used), estimate (what it would use)."""

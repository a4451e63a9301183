"""Where the user sees why: the causal map, the ledger, and one report of everything that was done."""

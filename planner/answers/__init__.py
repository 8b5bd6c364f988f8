"""The types that are told: below those who make them."""

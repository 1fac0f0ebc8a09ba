"""What an adapter does at a site, one module an op. `registry` lists them."""

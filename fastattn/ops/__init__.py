"""One file an op: schema, fake, autograd, autocast and public function."""

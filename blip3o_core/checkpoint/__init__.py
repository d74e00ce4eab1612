"""Files <-> tensors. Knows safetensors, shards and shapes; knows no architecture."""

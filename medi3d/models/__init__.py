"""Networks: Inception-V1, sources by name, the U-Net decoder, and what is put together from them."""

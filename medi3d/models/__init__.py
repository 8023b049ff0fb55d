"""Networks: Inception-V1, sources by name, the U-Net decoder, and the models built from them."""

"""Operations on a whole model: choosing its layers and their bits, packing them, and making them dense again."""

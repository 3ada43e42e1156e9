def reward(hand_to_block, contact_force, block_displacement,
           reach_weight=1.0, reach_scale=0.1, contact_weight=2.0, contact_threshold=1.0):
    rough = (contact_force > 2.0) | (block_displacement > 0.05)
    touching = (contact_force > contact_threshold) & ~rough
    reach = reach_weight * np.exp(-hand_to_block / reach_scale)
    contact = contact_weight * (np.where(touching, 1.0, 0.0) - np.where(rough, 1.0, 0.0))
    return {"reach": reach, "contact": contact}

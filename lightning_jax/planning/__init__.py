"""Whether, how and at what cost a run trains on devices that are not here."""

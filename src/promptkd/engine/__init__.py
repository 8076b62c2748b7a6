"""Running a model: one interface, one implementation per kind of device."""

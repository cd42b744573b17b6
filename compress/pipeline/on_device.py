"""Where a target is timed: here, or on the device of the inventory that it names."""

from __future__ import annotations

from pathlib import Path

from compress.bench.place import HERE, LaunchHost
from compress.targets import Profile


def place_of(profile: Profile, recipe_folder: Path) -> LaunchHost:
    """This machine, or the device, by the `devices.yaml` beside the recipe or in the current folder.

    Raises `InputError` for a device that no inventory has. Nothing is connected yet.
    """
    if profile.device is None:
        return HERE
    from compress.devices.inventory import choose_devices, find_inventory, read_inventory
    from compress.devices.place import DevicePlace

    file = find_inventory(None, [recipe_folder, Path()])
    device = choose_devices(read_inventory(file), [profile.device], file)[profile.device]
    return DevicePlace(profile.device, device, file.absolute().parent)

"""`blip3o bench` on nano: its ratios are printed. A timing is no reason to fail, a missing one is."""

import json

from ..conftest import command_environment


def test_ratios_of_all_stages_are_printed(blip3o, capsys):
    assert "BLIP3O_MODEL" not in command_environment()
    result = blip3o("bench", "--rounds", 3, "--batch", 1, "--batch", 4, "--reference-steps", 100, "--json", check=True)
    measurements = json.loads(result.stdout)["measurements"]
    with capsys.disabled():
        print("\nspeed next to the plain way, nano:")
        for one in measurements:
            if one["ratio"] is not None:
                error = "" if one["error"] is None else f"  error {one['error']:.4f}"
                print(f"  {one['stage']:<12}{one['variant']:<18} batch {one['batch']}  {one['ratio']:.2f}{error}")
    assert len(measurements) == 38 and all(one["seconds"] > 0 for one in measurements)

"""What a Raspberry Pi's sys and proc look like to doctor, as folders."""

from pathlib import Path


def pi(folder: Path, mhz: int = 1800, most: int = 1800, governor: str = "ondemand", degrees: float = 52.1, throttled: int | None = 0,
       swap_mib: tuple[int, int] = (200, 0), allowed: int | None = None) -> Path:  # fmt: skip
    """A Pi 4 at `mhz` of `most`; `throttled`: get_throttled's bits, None without vcgencmd; `swap_mib`: all and used."""
    clock = folder / "sys/devices/system/cpu/cpu0/cpufreq"
    for name, value in {
        "scaling_cur_freq": mhz * 1000, "cpuinfo_max_freq": most * 1000, "scaling_max_freq": (allowed or most) * 1000,
        "scaling_governor": governor,
    }.items():  # fmt: skip
        write(clock / name, value)
    write(folder / "sys/class/thermal/thermal_zone0/temp", round(degrees * 1000))
    total, free = swap_mib[0] * 1024, (swap_mib[0] - swap_mib[1]) * 1024
    write(folder / "proc/meminfo", f"MemTotal: 4000000 kB\nSwapTotal: {total} kB\nSwapFree: {free} kB")
    if throttled is not None:
        program = folder / "usr/bin/vcgencmd"
        write(program, f'#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled={throttled:#x}')
        program.chmod(0o755)
    return folder


def write(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{value}\n")

"""When to leave a mirror alone. Monotonic clock times in seconds are passed in: no clock, no I/O here."""

from __future__ import annotations

from dataclasses import dataclass, field

# Five errors spread over days must not disable a mirror (upstream's do): old failures weigh half after this time.
HALF_LIFE = 30.0
MAX_PAUSE = 120.0
# A blob that a mirror does not have, or has wrong, is asked for elsewhere for this long.
BLOB_PAUSE = 30.0
MAX_BLOBS = 256


@dataclass(slots=True)
class Health:
    """Of one mirror, shared by all images that use it.

    Failures add up to `failure_limit`; then the mirror is left out for `interval` seconds, after which one request
    (or ping) tries it while the others still pass it by. Each failed trial doubles the pause.
    """

    failure_limit: int = 5
    interval: float = 5.0
    _weight: float = 0.0
    _updated: float = 0.0
    _pause: float = 0.0
    _down_until: float = 0.0
    _trial_until: float = 0.0
    _blobs: dict[str, float] = field(default_factory=dict)

    @property
    def down(self) -> bool:
        return self._pause > 0

    def admit(self, now: float, blob_id: str, trial_seconds: float) -> str:
        """'yes', 'trial' (this request decides about the mirror) or 'no'."""
        if self._blobs.get(blob_id, 0.0) > now:
            return "no"
        if not self.down:
            return "yes"
        if now < self._down_until or now < self._trial_until:
            return "no"
        self._trial_until = now + trial_seconds
        return "trial"

    def success(self) -> bool:
        """True when the mirror was down and is back."""
        was_down = self.down
        self._weight = self._pause = self._trial_until = 0.0
        return was_down

    def failure(self, now: float, *, hung: bool = False) -> bool:
        """True when this failure takes the mirror out. A hang costs seconds, a refusal none: it weighs half a limit."""
        self._weight *= 0.5 ** ((now - self._updated) / HALF_LIFE)
        self._updated = now
        limit = max(1, self.failure_limit)
        self._weight += max(1.0, limit / 2) if hung else 1.0
        # The tolerance lets equal failures in a row count fully though each has decayed a little.
        if self.down or self._weight > limit - 0.5:
            first = not self.down
            self._pause = min(MAX_PAUSE, self._pause * 2 or max(1.0, self.interval))
            self._down_until = now + self._pause
            self._trial_until = 0.0
            return first
        return False

    def shun_blob(self, blob_id: str, now: float) -> None:
        while len(self._blobs) >= MAX_BLOBS:
            del self._blobs[next(iter(self._blobs))]
        self._blobs[blob_id] = now + BLOB_PAUSE

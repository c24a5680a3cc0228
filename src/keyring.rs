//! Keys and slots as rules: states and legal transitions, privileges, key names, contexts.
//!
//! Called by key administration, the cache (what opens, what seals) and the worker. Invariant:
//! every change of a slot's state goes through [`SlotState::may_become`], so that what is not in
//! that table cannot happen. Whether a legal transition is due (proof, grace period, horizon) the
//! caller decides.

use std::fmt;

/// The states of a slot.
///
/// ```text
/// pending --promote--> active --rotate--> previous --proof--> drained --> disabled --> destroyed
///    |                   ^                   |                   |            |
///    +--> destroyed      +---- rollback -----+-------------------+      enable (reversible)
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SlotState {
    /// Staged ahead: known everywhere before its first use.
    Pending,
    /// Serves new writes; at most one per key.
    Active,
    /// The fallback: opens what is not yet re-encrypted.
    Previous,
    /// Proved unused.
    Drained,
    /// Opens nothing, reversibly: the test before the irreversible step.
    Disabled,
    /// Its wrapped keys are deleted; the row stays as a tombstone.
    Destroyed,
}

impl SlotState {
    /// All of them, in the order of a slot's life.
    pub const ALL: [SlotState; 6] = [
        SlotState::Pending,
        SlotState::Active,
        SlotState::Previous,
        SlotState::Drained,
        SlotState::Disabled,
        SlotState::Destroyed,
    ];

    /// The word in the catalog and the views.
    pub fn name(self) -> &'static str {
        match self {
            SlotState::Pending => "pending",
            SlotState::Active => "active",
            SlotState::Previous => "previous",
            SlotState::Drained => "drained",
            SlotState::Disabled => "disabled",
            SlotState::Destroyed => "destroyed",
        }
    }

    /// The state of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }

    /// Whether new values are sealed under such a slot.
    pub fn seals(self) -> bool {
        self == SlotState::Active
    }

    /// Whether envelopes of such a slot open.
    pub fn opens(self) -> bool {
        !matches!(self, SlotState::Disabled | SlotState::Destroyed)
    }

    /// Whether a slot in this state may change to `to`. Staying is no transition.
    pub fn may_become(self, to: SlotState) -> bool {
        use SlotState::{Active, Destroyed, Disabled, Drained, Pending, Previous};
        match (self, to) {
            // promote
            (Pending, Active) => true,
            // rotate; rollback_rotation, which also brings a superseded slot back
            (Active, Previous) | (Previous | Drained, Active) => true,
            // the drain proof; mark_compromised voids it
            (Previous, Drained) | (Drained, Previous) => true,
            // disable_slot: previous only by force
            (Previous | Drained, Disabled) => true,
            // enable_slot: drained if its proof stands
            (Disabled, Previous | Drained) => true,
            // destroy_slot (pending; disabled; the others by force), shred_key (all)
            (Pending | Active | Previous | Drained | Disabled, Destroyed) => true,
            // restore_slot
            (Destroyed, Previous) => true,
            _ => false,
        }
    }
}

impl fmt::Display for SlotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a role may do with a key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Privilege {
    /// Everything, and shredding the key.
    Owner,
    /// Grants (to himself too: so it leads to plaintext, on purpose), policy, the end of slots.
    Manage,
    /// Rotation: what a cron role gets; no plaintext, no grants.
    Rotate,
    /// Sealing.
    Encrypt,
    /// Opening.
    Decrypt,
}

impl Privilege {
    /// All of them, the strongest first.
    pub const ALL: [Privilege; 5] = [
        Privilege::Owner,
        Privilege::Manage,
        Privilege::Rotate,
        Privilege::Encrypt,
        Privilege::Decrypt,
    ];

    /// The word in grants.
    pub fn name(self) -> &'static str {
        match self {
            Privilege::Owner => "owner",
            Privilege::Manage => "manage",
            Privilege::Rotate => "rotate",
            Privilege::Encrypt => "encrypt",
            Privilege::Decrypt => "decrypt",
        }
    }

    /// The privilege of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|privilege| privilege.name() == name)
    }

    fn bit(self) -> u8 {
        match self {
            Privilege::Owner => 1 << 0,
            Privilege::Manage => 1 << 1,
            Privilege::Rotate => 1 << 2,
            Privilege::Encrypt => 1 << 3,
            Privilege::Decrypt => 1 << 4,
        }
    }
}

impl fmt::Display for Privilege {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A set of granted privileges, in one byte: what the cache memoises per user and key.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Privileges(u8);

impl Privileges {
    /// No privilege at all.
    pub const NONE: Privileges = Privileges(0);

    /// Adds a granted privilege.
    #[inline]
    pub fn insert(&mut self, privilege: Privilege) {
        self.0 |= privilege.bit();
    }

    /// What either of two sets holds: grants through several roles add up.
    #[inline]
    #[must_use]
    pub fn union(self, other: Privileges) -> Privileges {
        Privileges(self.0 | other.0)
    }

    /// Whether the privilege itself was granted.
    #[inline]
    pub fn contains(self, privilege: Privilege) -> bool {
        self.0 & privilege.bit() != 0
    }

    /// Whether the set allows what `privilege` allows: owner implies all, the others only
    /// themselves. (manage may grant, hence take, encrypt and decrypt; it does not have them.)
    #[inline]
    pub fn implies(self, privilege: Privilege) -> bool {
        self.0 & (privilege.bit() | Privilege::Owner.bit()) != 0
    }

    /// Whether nothing was granted.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl FromIterator<Privilege> for Privileges {
    fn from_iter<I: IntoIterator<Item = Privilege>>(privileges: I) -> Self {
        let mut set = Privileges::NONE;
        for privilege in privileges {
            set.insert(privilege);
        }
        set
    }
}

/// The longest key name, in bytes of UTF-8.
pub const MAX_KEY_NAME_LEN: usize = 200;

/// Why a text is no key name (SQLSTATE 22023).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyNameError {
    /// No character at all.
    Empty,
    /// More than 200 bytes.
    TooLong {
        /// Bytes of UTF-8.
        len: usize,
    },
    /// A control character (Unicode category Cc), tab and newline among them.
    ControlCharacter,
    /// White space (Unicode property `White_Space`) at the beginning or the end.
    SpaceAtEnd,
}

impl KeyNameError {
    /// The facts, for an error's DETAIL.
    pub fn detail(self) -> String {
        match self {
            KeyNameError::Empty => "The key name is empty.".to_owned(),
            KeyNameError::TooLong { len } => format!(
                "The key name has {len} bytes in UTF-8; at most {MAX_KEY_NAME_LEN} are allowed."
            ),
            KeyNameError::ControlCharacter => {
                "The key name contains a control character.".to_owned()
            }
            KeyNameError::SpaceAtEnd => "The key name begins or ends with a space.".to_owned(),
        }
    }
}

impl fmt::Display for KeyNameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail())
    }
}

impl std::error::Error for KeyNameError {}

/// Checks a key name: 1 to 200 bytes of UTF-8, no control characters, no space at either end.
/// Names are case-sensitive and are not normalised.
pub fn valid_key_name(name: &str) -> Result<(), KeyNameError> {
    if name.is_empty() {
        return Err(KeyNameError::Empty);
    }
    if name.len() > MAX_KEY_NAME_LEN {
        return Err(KeyNameError::TooLong { len: name.len() });
    }
    if name.contains(char::is_control) {
        return Err(KeyNameError::ControlCharacter);
    }
    if name.starts_with(char::is_whitespace) || name.ends_with(char::is_whitespace) {
        return Err(KeyNameError::SpaceAtEnd);
    }
    Ok(())
}

/// A context of several parts, as `rekey.context()` makes it: per part its decimal length in bytes
/// of UTF-8, `:`, the text, `,`. Injective, so no two lists of parts share a context. That there is
/// a part, the caller checks: an empty context would mean none.
pub fn bind_parts(parts: &[&str]) -> String {
    let mut context = String::new();
    for part in parts {
        context.push_str(&part.len().to_string());
        context.push(':');
        context.push_str(part);
        context.push(',');
    }
    context
}

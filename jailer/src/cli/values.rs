//! Values that are one of a few words: the parser, completions and helps name the same.

use crate::audit::AUDITED;
use crate::audit::catalogue::{ATTACKS, Attack};
use crate::audit::wall::Wall;
use crate::sandbox::{Role, SeccompMode};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use vm_spec::machine::MAX_CPUS;
use vm_spec::spec::{MOST_HOTPLUG, OnDeviceDeath, OnReboot};

fn one_of<T, const N: usize>(words: [(&'static str, T); N]) -> impl TypedValueParser<Value = T>
where
    T: Copy + Send + Sync + 'static,
{
    PossibleValuesParser::new(words.map(|(word, _)| word)).try_map(move |given| {
        let known = words.iter().find(|(word, _)| *word == given);
        known.map(|(_, value)| *value).ok_or("there is no such word")
    })
}

pub(super) fn role() -> impl TypedValueParser<Value = Role> {
    one_of(Role::ALL.map(|role| (role.name(), role)))
}

pub(super) fn audited() -> impl TypedValueParser<Value = Role> {
    one_of(AUDITED.map(|role| (role.name(), role)))
}

pub(super) fn attack() -> impl TypedValueParser<Value = &'static Attack> {
    PossibleValuesParser::new(ATTACKS.iter().map(|attack| attack.name)).try_map(|given| {
        let known = ATTACKS.iter().find(|attack| attack.name == given);
        known.ok_or("there is no such attack")
    })
}

pub(super) fn wall() -> impl TypedValueParser<Value = Wall> {
    one_of(Wall::ALL.map(|wall| (wall.name(), wall)))
}

pub(super) fn seccomp() -> impl TypedValueParser<Value = SeccompMode> {
    one_of([
        ("enforce", SeccompMode::Enforce),
        ("trap", SeccompMode::Trap),
        ("log", SeccompMode::Log),
        ("off", SeccompMode::Off),
    ])
}

pub(super) fn on_reboot() -> impl TypedValueParser<Value = OnReboot> {
    one_of([("restart", OnReboot::Restart), ("exit", OnReboot::Exit)])
}

pub(super) fn on_device_death() -> impl TypedValueParser<Value = OnDeviceDeath> {
    one_of([("restart", OnDeviceDeath::Restart), ("end", OnDeviceDeath::End)])
}

pub(super) fn cpus(text: &str) -> Result<u8, String> {
    let number = text.parse().ok().filter(|n| (1..=MAX_CPUS).contains(n));
    number.ok_or_else(|| format!("expected a number from 1 to {MAX_CPUS}"))
}

pub(super) fn hotplug(text: &str) -> Result<u8, String> {
    let number = text.parse().ok().filter(|n| *n <= MOST_HOTPLUG);
    number.ok_or_else(|| format!("expected a number from 0 to {MOST_HOTPLUG}"))
}

/// In a help's words.
pub(super) fn any_of(names: &[&str]) -> String {
    match names {
        [others @ .., last] if !others.is_empty() => format!("{} or {last}", others.join(", ")),
        names => names.concat(),
    }
}

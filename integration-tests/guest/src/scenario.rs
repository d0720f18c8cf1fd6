//! The scenarios, by name.

use crate::{cpu, parameters::Parameters, serial::line};
use guest_contract::machine;

/// Why a scenario failed.
pub(crate) type Failure = &'static str;

/// Runs what the command line asks for, prints the result, and powers off.
pub(crate) fn run(command_line: &str) -> ! {
    let parameters = Parameters(command_line);
    let name = parameters.text("scenario").unwrap_or("poweroff");
    if name == "instant-reset" {
        cpu::reset();
    }
    line!("scenario={name}");
    let result = match name {
        "poweroff" => Ok(()),
        "reset" => cpu::reset(),
        "panic" => {
            cpu::out8(machine::PVPANIC, 1);
            Err("the machine went on after a panic")
        }
        "triplefault" => cpu::triple_fault(),
        "hlt" => cpu::halt(),
        _ => Err("unknown scenario"),
    };
    match result {
        Ok(()) => line!("result=ok"),
        Err(reason) => line!("result=fail {reason}"),
    }
    cpu::power_off()
}

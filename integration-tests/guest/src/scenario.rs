//! The scenarios, by name.

use crate::{blk, cpu, flushed, internet, net, parameters::Parameters, pci, serial, serial::line, storm};
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
        "hlt" => {
            line!("ready=1");
            cpu::halt()
        }
        "pci" => pci::scenario(),
        "blk" => blk::scenario(parameters),
        "msix-mask" => blk::mask_scenario(parameters),
        "needs-reset" => blk::needs_reset_scenario(parameters),
        "reboot" => blk::reboot_scenario(parameters),
        "flushed" => flushed::scenario(parameters),
        "storm" => storm::scenario(parameters),
        "net" => net::scenario(parameters),
        "net-echo" => net::echo_scenario(parameters),
        "net-user" => internet::scenario(parameters),
        _ => Err("unknown scenario"),
    };
    match result {
        Ok(()) => line!("result=ok"),
        Err(reason) => line!("result=fail {reason}"),
    }
    cpu::power_off()
}

/// With `sync=1`: says that set-up is over, and waits for a byte on the console.
pub(crate) fn before_work(parameters: Parameters<'_>) {
    phase(parameters, "work");
}

/// With `sync=1`: says that the work is done, and waits for a byte on the console.
pub(crate) fn after_work(parameters: Parameters<'_>) {
    phase(parameters, "done");
}

fn phase(parameters: Parameters<'_>, name: &str) {
    if parameters.number("sync", 0) == 1 {
        line!("phase={name}");
        serial::wait_for_byte();
    }
}

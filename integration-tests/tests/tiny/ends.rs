//! How guests end, and that each end is told apart.

use crate::fixture::{Disk, Server};
use crate::work::no_rekicks;
use anyhow::{Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    suite::test,
    tiny::{Vm, VmOptions},
};
use libtest_mimic::Trial;
use std::time::Duration;
use vm_spec::control::{EndReason, ToVmm};

const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn tests() -> Vec<Trial> {
    let ends = [
        ("poweroff", EndReason::PowerOff),
        ("reset", EndReason::Reset),
        ("instant-reset", EndReason::InstantReset),
        ("panic", EndReason::Panic),
        ("triplefault", EndReason::TripleFault),
    ];
    let mut tests: Vec<_> = ends
        .into_iter()
        .map(|(scenario, reason)| test(format!("ends::{scenario}"), move || ends_with(scenario, reason)))
        .collect();
    tests.push(test("ends::one_byte", one_byte));
    tests.push(test("ends::stop", stop));
    tests.push(test("ends::supervisor_gone", supervisor_gone));
    tests.push(test("ends::reboots_20_times", reboots));
    tests.push(test("ends::addresses_agree", addresses_agree));
    tests.push(test("ends::pci", pci));
    tests
}

fn ends_with(scenario: &str, reason: EndReason) -> Result<()> {
    Host::need_kvm()?;
    let vm = Vm::start(&VmOptions::tiny(format!("scenario={scenario}")), Vec::new())?;
    let ended = vm.wait_end(DEADLINE)?;
    ensure!(
        ended.reason == reason,
        "{:?}; console:\n{}",
        ended.reason,
        ended.console.text()
    );
    if reason == EndReason::PowerOff {
        ended.console.expect_ok()?;
    }
    Ok(())
}

fn one_byte() -> Result<()> {
    Host::need_kvm()?;
    let options = VmOptions {
        kernel: Artifact::TinyByte,
        ..VmOptions::tiny("")
    };
    let ended = Vm::start(&options, Vec::new())?.wait_end(DEADLINE)?;
    ensure!(ended.reason == EndReason::PowerOff, "{:?}", ended.reason);
    ensure!(ended.console.text() == "B", "console: {:?}", ended.console.text());
    Ok(())
}

/// The supervisor ends a guest that does nothing.
fn stop() -> Result<()> {
    Host::need_kvm()?;
    let mut vm = Vm::start(&VmOptions::tiny("scenario=hlt"), Vec::new())?;
    vm.console.wait_line("ready=1", DEADLINE)?;
    vm.send(ToVmm::Stop)?;
    let ended = vm.wait_end(DEADLINE)?;
    ensure!(ended.reason == EndReason::Stopped, "{:?}", ended.reason);
    Ok(())
}

/// A vmm whose supervisor is gone does not stay.
fn supervisor_gone() -> Result<()> {
    Host::need_kvm()?;
    let mut vm = Vm::start(&VmOptions::tiny("scenario=hlt"), Vec::new())?;
    vm.console.wait_line("ready=1", DEADLINE)?;
    let mut process = vm.abandon();
    process.wait(Duration::from_secs(2))?;
    Ok(())
}

/// Each boot finds the disk again and counts itself there.
fn reboots() -> Result<()> {
    Host::need_kvm()?;
    let (disk, device) = Disk::start(Server::Ours)?;
    let options = VmOptions {
        restart_on_reboot: true,
        ..VmOptions::tiny("scenario=reboot sync=1 reboots=20")
    };
    let mut vm = Vm::start(&options, vec![device])?;
    let done = vm.console.wait_line("phase=done", DEADLINE);
    done.map_err(|error| disk.explain(error))?;
    no_rekicks(&vm.stats(DEADLINE)?)?;
    vm.type_text("d")?;
    let ended = vm.wait_end(DEADLINE).map_err(|error| disk.explain(error))?;
    ended.console.expect_ok()?;
    ensure!(ended.reason == EndReason::PowerOff, "{:?}", ended.reason);
    ensure!(ended.console.number("boots")? == 21, "{}", ended.console.text());
    ensure!(ended.reboots == 20, "{} reboots reported", ended.reboots);
    Ok(())
}

/// The guest's constants are those of the machine.
fn addresses_agree() -> Result<()> {
    use guest_contract::machine as guest;
    use vm_spec::machine;
    ensure!(guest::COM1 == machine::COM1_PORT && guest::COM1_GSI == machine::COM1_GSI);
    ensure!(guest::SLEEP_CONTROL == machine::SLEEP_CONTROL_PORT && guest::RESET == machine::RESET_PORT);
    ensure!(
        guest::SLEEP_S5 == machine::S5_SLEEP_TYPE << 2 | 1 << 5 && guest::RESET_VALUE == machine::RESET_VALUE
    );
    ensure!(guest::PVPANIC == machine::PVPANIC_PORT && guest::ECAM == machine::ECAM_START);
    ensure!(guest::IO_APIC == machine::IOAPIC_START && guest::LOCAL_APIC == machine::LAPIC_START);
    Ok(())
}

/// ECAM and CF8 show the same functions: the host bridge and the disk.
fn pci() -> Result<()> {
    Host::need_kvm()?;
    let (_disk, device) = Disk::start(Server::Reference)?;
    let vm = Vm::start(&VmOptions::tiny("scenario=pci"), vec![device])?;
    let ended = vm.wait_end(DEADLINE)?;
    ended.console.expect_ok()?;
    ensure!(
        ended.console.value("pci.0")?.contains("class 060000"),
        "{}",
        ended.console.text()
    );
    ensure!(
        ended.console.value("pci.1")?.starts_with("1af4:1042"),
        "{}",
        ended.console.text()
    );
    Ok(())
}

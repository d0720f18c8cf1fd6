//! The tiny guest on this host's KVM, hardware or software.

mod audit;
mod bad_input;
mod clients;
mod descriptors;
mod dry_run;
mod ends;
mod fixture;
mod helpers;
mod hostile;
mod images;
mod jails;
mod limits;
mod listen;
mod net;
mod net_others;
mod orders;
mod run;
mod service;
mod taps;
mod terminal;
mod tour;
mod traces;
mod unread;
mod verbs;
mod work;

use std::process::ExitCode;

fn main() -> ExitCode {
    integration_tests::demo::peer::intercept();
    let mut tests = Vec::new();
    tests.extend(audit::tests());
    tests.extend(bad_input::tests());
    tests.extend(clients::tests());
    tests.extend(dry_run::tests());
    tests.extend(ends::tests());
    tests.extend(helpers::tests());
    tests.extend(hostile::tests());
    tests.extend(images::tests());
    tests.extend(jails::tests());
    tests.extend(limits::tests());
    tests.extend(listen::tests());
    tests.extend(net::tests());
    tests.extend(net_others::tests());
    tests.extend(orders::tests());
    tests.extend(run::tests());
    tests.extend(service::tests());
    tests.extend(taps::tests());
    tests.extend(terminal::tests());
    tests.extend(tour::tests());
    tests.extend(unread::tests());
    tests.extend(verbs::tests());
    tests.extend(work::tests());
    integration_tests::suite::run(tests)
}

"""FlexRec inside other trainers and engines, a module each; importing one needs the package it is named after."""

"""The one finder of linear calls, with the bias and the BatchNorm behind them, wherever they are made: in modules, in
functions, and inside leaf modules. All refits use it."""
